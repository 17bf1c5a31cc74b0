"""The process that takes jobs from the store and supervises a trainer; never reaches torch."""
