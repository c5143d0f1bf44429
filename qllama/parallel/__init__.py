"""Many devices: the mesh, what of each weight a device holds, layers that talk to each other."""
