"""Metrics, their summary over a folder of cases, and the report of a run."""
