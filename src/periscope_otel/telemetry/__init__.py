"""What operations emit, and the pipeline that carries it."""
