"""Films, contact sheets and charts; and the reader of pictures that a user gives."""
