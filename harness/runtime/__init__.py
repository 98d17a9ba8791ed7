"""Running packed models: a decode step that reads packed weights, and the runners that measure its speed and memory."""
