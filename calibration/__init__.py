"""What stands around the calibration: text in, checks before it, the folder it writes."""
