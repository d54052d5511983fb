"""The ground under common.py: nobody needs to read it to understand a method."""
