"""States and exports on the Hugging Face hub, or on a server with the same interface (`HF_ENDPOINT`)."""

from perpetune.hub.pulling import Pulled, pull
from perpetune.hub.pushing import Pushed, push

__all__ = ["Pulled", "Pushed", "pull", "push"]
