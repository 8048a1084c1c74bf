"Exercises whose answers are checked: `check(id, answer)`, `hint(id)`, and copies of the chapters for a class."
from .kit import Report as Report, check as check, hint as hint
