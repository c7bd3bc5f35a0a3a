"""Every steering method against hallucination: one trade-off curve."""
