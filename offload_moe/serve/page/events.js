// Server-sent events out of a response's body.

/** Yields the data of each event; comments that keep the connection alive yield null. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
        else if (line.startsWith(":")) yield null;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
