"""Everything about checkpoint files. Import the submodules; nothing is re-exported."""
