"""Reading files that users name, and writing files that survive interruptions."""
