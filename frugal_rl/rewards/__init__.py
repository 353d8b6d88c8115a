"""What judges responses: answers read out of text, compared exactly, and what runs in killable workers."""
