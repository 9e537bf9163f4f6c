"""A finished run as one page, with its plots."""
