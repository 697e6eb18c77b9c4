"""Files, recipes and folders made to hurt, by a seeded mutator, and children with limits that open them."""
