"""Ways to adapt a frozen encoder, one file a method."""
