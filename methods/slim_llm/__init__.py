"""SliM-LLM: bit widths by column group, a salience-weighted search of each group's range, GPTQ's compensation.

`allocation` chooses the widths, `ranges` fits a group's grid, `method` walks the columns; `plus` learns clipping
instead (SliM-LLM+). Source: Huang et al. 2024, arXiv 2405.14917; Aaronhuang-778/SliM-LLM cfdf5ff.
"""

from methods.slim_llm.method import SlimLlm, SlimLlmConfig
from methods.slim_llm.plus import SlimLlmPlus, SlimLlmPlusConfig

__all__ = ["SlimLlm", "SlimLlmConfig", "SlimLlmPlus", "SlimLlmPlusConfig"]
