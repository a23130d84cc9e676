"""What the ops launch: the compiled core (`cpp`)."""
