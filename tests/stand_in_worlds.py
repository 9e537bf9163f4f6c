"""Environments in the forms that people have: TRL classes, an OpenEnv client, an MCP server (`python stand_in_worlds.py`)."""

from types import SimpleNamespace


class Guessing:
    """TRL's form: the model guesses a number."""

    def __init__(self):
        self.reward = 0.0

    def reset(self, number=0, **row):
        self.number, self.reward = number, 0.0
        return " It is between 0 and 9."

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess.

        Returns:
            How it compares.
        """
        if not 0 <= number <= 9:
            raise ValueError("out of range")
        self.reward = float(number == self.number)
        return "right" if self.reward else "higher" if number < self.number else "lower"


class Secretive(Guessing):
    """One with a method that says what is right."""

    def secret(self):
        return f"the number is {self.number}"


class AsyncGuessing(Guessing):
    """The same with async methods and a reward of its own."""

    async def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess.
        """
        return super().guess(number)

    async def get_reward(self) -> float:
        return 2 * self.reward


class Restless(Guessing):
    """One whose resets differ."""

    resets = 0

    def reset(self, **row):
        Restless.resets += 1
        return f" Try {Restless.resets}."


class Broken(Guessing):
    """One that does not begin."""

    def reset(self, **row):
        return row["not there"]


def halved(environments, prompts, completions, number, **rest):
    assert prompts[0][-1]["role"] == "user" and completions[0][-1]["role"] == "assistant" and len(number) == 1
    return [environment.reward / 2 for environment in environments]


class Client:
    """OpenEnv's form: a counter that ends at three."""

    open = 0

    def __init__(self, base_url):
        self.at, Client.open = 0, Client.open + 1

    def sync(self):
        return self

    def reset(self, seed=0):
        self.at = seed
        return SimpleNamespace(observation={"text": f"at {seed}"}, reward=None, done=False)

    def step(self, action):
        if action.get("type") == "list_tools":
            return SimpleNamespace(
                observation={"tools": [{"name": "up", "input_schema": {"type": "object"}}]}, reward=None, done=False
            )
        self.at += action.get("arguments", {}).get("by", 1)
        return SimpleNamespace(observation={"text": f"at {self.at}"}, reward=self.at / 3, done=self.at >= 3)

    def close(self):
        Client.open -= 1


def judge(row, transcript, end):
    return float(end == "done" and str(row["sum"]) in transcript[-1]["content"])


def serve():
    """MCP's form: a memory that adds up."""
    from mcp.server.mcpserver import MCPServer

    server, total = MCPServer("sums"), [0]

    @server.tool()
    def add(number: int) -> str:
        """Add a number to the sum so far."""
        if number < 0:
            raise ValueError("only forward")
        total[0] += number
        return str(total[0])

    server.run()


if __name__ == "__main__":
    serve()
