// What happens when everything else is there: the address may name a problem or a trace, and the page may be printed.

followLink();
addEventListener("hashchange", followLink);

// Paper has no folds: they are open while the page is printed, except for the configurations as text.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open], .text)")];
  for (const fold of unfolded) fold.open = true;
});
addEventListener("afterprint", () => { for (const fold of unfolded) fold.open = false; });
