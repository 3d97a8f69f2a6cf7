// What a stream's reader sees of its speed: time to the first token, tokens per second, total.
//
//   const watch = new Stopwatch(showMeasures); watch.piece(); watch.end(usage);

const PERIOD_MS = 100;

export class Stopwatch {
  constructor(show) {
    this.show = show;
    this.startedAt = performance.now();
    this.pieces = 0;
    this.timer = setInterval(() => this.tell(), PERIOD_MS);
    this.tell();
  }

  piece() {
    this.pieces += 1;
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
  }

  // Ends with the gateway's own count, where there is one.
  end(usage) {
    clearInterval(this.timer);
    this.endedAt = performance.now();
    this.usage = usage;
    this.tell();
  }

  tell() {
    const now = this.endedAt ?? performance.now();
    // A piece of text is about one token; the gateway's count comes last.
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const decoding = (this.endedAt ? this.lastAt : now) - this.firstAt;
    this.show({
      firstToken_ms: (this.firstAt ?? now) - this.startedAt,
      hasBegun: this.firstAt !== undefined,
      tokensPerSecond: tokens > 1 && decoding > 0 ? (1000 * (tokens - 1)) / decoding : null,
      tokens,
      promptTokens: this.usage?.prompt_tokens,
      isExact: this.usage !== undefined,
      total_s: (now - this.startedAt) / 1000,
    });
  }
}
