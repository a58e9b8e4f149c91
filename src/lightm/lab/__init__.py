"""The lab: comparing methods, measuring speed and memory, counting parameters and operations."""
