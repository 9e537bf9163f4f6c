"""Environments that people already have, one file a protocol: TRL classes, reasoning-gym, skyrl-gym, OpenEnv, MCP servers."""
