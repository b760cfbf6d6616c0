"""Time and memory, beside another route where there is one."""
