"""What tools/check_device.py is made of: the graphs, the machine, what processes leave for each other, the report."""
