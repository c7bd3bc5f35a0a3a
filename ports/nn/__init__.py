"""Building blocks of the ports: layers, decoders, encoders, towers, and the joined models."""
