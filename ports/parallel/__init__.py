"""Many devices and hosts: where arrays lie on a mesh, and processes that run as one."""
