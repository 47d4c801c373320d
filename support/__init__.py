"""What every command stands on: command lines, files, devices."""
