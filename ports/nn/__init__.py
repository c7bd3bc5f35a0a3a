"""What ports are built of: layers, decoders, encoders, towers, and how they are joined."""
