"""The surface on D-Bus: objects served, the guard before them, and polkit."""
