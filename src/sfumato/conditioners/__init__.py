"""What a user gives (prompts, labels …), turned into the slots of a `Condition`."""
