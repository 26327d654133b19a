"""What every part stands on: errors, files, input and output, devices, processes."""
