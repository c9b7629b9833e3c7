"""Trajectories and problems made by teachers: played, filtered, kept."""
