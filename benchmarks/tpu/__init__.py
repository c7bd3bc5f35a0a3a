"""TPU executables, made by the TPU's own compiler on any machine and read: see `__main__`."""
