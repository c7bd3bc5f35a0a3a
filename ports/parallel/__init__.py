"""Many devices and hosts: sharding of arrays over a mesh, and several processes as one run."""
