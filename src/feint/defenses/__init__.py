"""Defenses: one `Defense` per file, chains of them, and the expressions that people type."""
