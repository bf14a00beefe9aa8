"""Methods as somebody else would add them: each file is all that there is of one."""
