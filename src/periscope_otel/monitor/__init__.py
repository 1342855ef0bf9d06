"""What watches the operations of this process and shows it to a person."""
