package cli

import (
	"log"
	"log/slog"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/logqueue"
)

// The messages of libraries take the way, the format and the level of the log.
func TestStandardLogger(t *testing.T) {
	out, flags := log.Writer(), log.Flags()
	t.Cleanup(func() {
		log.SetOutput(out)
		log.SetFlags(flags)
	})
	for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo} {
		var text output
		logs := logqueue.New(&text)
		Process{Stderr: logs, logs: logs}.queueLog(config.Log{JSON: true, Level: level})
		log.Print("from a library")
		logs.Flush()
		if logged := strings.Contains(text.String(), `"level":"DEBUG","msg":"from a library"}`); logged != (level == slog.LevelDebug) {
			t.Errorf("at level %s: %s", level, &text)
		}
	}
}
