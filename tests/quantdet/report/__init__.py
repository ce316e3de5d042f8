"""What people read: JUnit properties, the terminal's header, progress and summary."""
