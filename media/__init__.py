"""Read clips from files and write them into files."""
