"""What every command runs on: flags and errors, processes, meshes, journals, logs."""
