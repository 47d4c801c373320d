"""Systems of other papers, one file each with its own options and command."""
