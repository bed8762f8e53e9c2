"""Estimating parameters, memory, disk and time from configs."""
