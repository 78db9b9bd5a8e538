"""Pictures for people: films, contact sheets, charts; and the one reader of pictures that a user gives."""
