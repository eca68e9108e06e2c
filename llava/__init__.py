"""llava: train small vision- and video-language models on any decoder-only Hugging Face language model.

Importing the package loads nothing heavy; torch and transformers come in with the module that
needs them, for example ``llava.model`` or ``llava.train.train``.
"""

from llava.compat import hush_imports
from llava.compat_llava import install_old_modules
from llava.constants import RELEASE

__version__ = RELEASE

hush_imports()
install_old_modules()
