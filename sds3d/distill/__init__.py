"""From a teacher's answers to a loss on a student: one core, and a folder for each family of methods."""
