"""A step of training: roll out, score, assign credit, update, push."""
