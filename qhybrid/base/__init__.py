"""The frozen base model: find it, read it one tensor at a time, quantise it to NF4 on the way in."""
