"""Support for every command: command lines, files, devices."""
