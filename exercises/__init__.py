"""Nine functions of the project to write yourself, and a grader: README.md."""
