// Browsers start no web worker for a page that was opened from a file, and the search needs one:
// there a hidden frame takes its place. On a server this does nothing.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      const script = inside.document.createElement("script");
      this.ready = new Promise((resolve) => (script.onload = resolve));
      inside.postMessage = (message) => {
        const event = new MessageEvent("message", { data: structuredClone(message) });
        setTimeout(() => {
          this.dispatchEvent(event);
          this.onmessage?.(event);
        });
      };
      script.src = new URL(url, location.href);
      inside.document.body.append(script);
    }

    postMessage(message) {
      const inside = this.frame.contentWindow;
      const data = inside.structuredClone(message);
      const event = new inside.MessageEvent("message", { data });
      this.ready.then(() => setTimeout(() => inside.dispatchEvent(event)));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
