"""Data sets: what a folder holds, its description, cases, faults and split; conversion and synthetic scans."""
