"""Who is measured: this project and PyTorch, on the same weights and inputs."""
